// Steps of 2 to kStepRows new rows of each sequence over a past, which they read once (kernels/engine/mixer_rows.py and the step_rows.py of both attentions).
#pragma once

#include "plan.h"

namespace sessa
{

// The plan of a problem that is such a step and no wider than these kernels, else `other`; of either the caller owns the result. On an architecture that has
// no binary for it (whose shared memory is too small) it is the other after all.
Plan* rowsOrMixer(Problem const& p, Plan* other);
Plan* rowsOrFeedback(Problem const& p, Plan* other);
Plan* rowsOrCausal(Problem const& p, Plan* other);

} // namespace sessa
