// Steps of 2 to kStepRows new rows of each sequence over a past, which they read once (kernels/engine/mixer_rows.py and the step_rows.py of both attentions).
#pragma once

#include "plan.h"

namespace sessa
{

// Each nullptr where a problem is no such step, or wider than these kernels.
Plan* planMixerRows(Problem const& p);
Plan* planFeedbackRows(Problem const& p);
Plan* planCausalRows(Problem const& p);

} // namespace sessa
