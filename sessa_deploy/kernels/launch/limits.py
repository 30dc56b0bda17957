"""Every number that the kernels, the rewriting of graphs and the plugin's C++ must agree on, each once. Standard library only, and nothing but constants."""

from __future__ import annotations

from sessa_deploy.contract import MAX_WIDTH, WIDTH_MULTIPLE

# --- any launch
ALIGNMENT = 16  # of what a kernel is promised to be aligned: bytes of a pointer, elements of a width or stride
WORKSPACE_ALIGNMENT = 256  # bytes between the buffers of a workspace
MAX_GRID = 65535  # programs along y and z
MAX_ROWS = (1 << 30) - 1  # of a sequence, new or past
LOG2E = 1.4426950408889634

# --- architectures, as compute capability; which there are, and which binary fits which: cuda_arch.py
DEPENDENT_ARCH = 90  # the first with programmatic dependent launch, which the variants that may start early are made for
FLOAT8_ARCH = 89  # the first that reads weights of E4M3
# Percent of a multiprocessor's shared memory that the kernels of one sequence's decode step, and those of a few wide rows around their attentions, ask the
# driver to set apart: all the same share, since one whose share is another waits until the multiprocessor is empty, and cannot start beside its predecessor.
# What is left caches loads. On an H200 this is the largest that makes it set 100 KiB apart (measured there).
SHARED_SHARE = 43
# The same where rows are wider than AHEAD_DEPTH, whose attentions want all of it and are long: they wish for it too. On WIDE_ARCH alone, where it was measured.
WIDE_SHARE, WIDE_ARCH = 100, 90
# Largest dynamic shared memory one block may ask for, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

# --- how a decode step's past is split
STEP_MAX_SPLITS = 256
STEP_PROGRAMS = 2112  # where the device does not say how many programs it holds

# --- feedback attention; rows of width D
FEEDBACK_MULTIPLE, FEEDBACK_MAX_WIDTH = WIDTH_MULTIPLE, MAX_WIDTH  # of D
FEEDBACK_WIDTHS = (256, 512, 1024, 2048, MAX_WIDTH)  # a row of the decode step is padded to the next of these
WIDE = 1024  # D from which a solve of any number of rows takes the tiles of variant "wide", where an architecture has them
WIDE_WORK = 9 << 20  # B T D from which it does: shorter chains matter below, reads above (measured on an H200, in bf16 both ways, in fp16 the forward)
WIDE_COLUMNS = 4096  # B D from which the solve in halves takes them: there are chains enough to fill the GPU (measured on an H200)
LONG_WORK = 12 << 20  # B T D from which it does, forward, whatever B D: its products take longer than a chain's way from block to block (on an H200)
FEW_WORK = 2 << 20  # B T D below which tiles are small, or there are fewer than multiprocessors (measured on an H200 in bf16)
PANEL_BYTES = 1 << 30  # of the routing tiles of one panel
# Programs of the kernels that walk the rows of a past there may be: one for each tile of a capacity costs a microsecond for every few hundred that are empty.
PACK_PROGRAMS = 64
SCORE_PROGRAMS = 1024
SCORE_COLUMNS = 256  # of a tile of scores whose programs share the tiles
# New rows of a sequence, and of all of them, from which they do behind a past, whose length only the device knows.
PAST_ROWS, PAST_WORK = 4096, 8192

# --- causal attention; heads of width d
HEAD_MULTIPLE = 8  # of d and of every stride, which are passed in these units: what 16-byte loads of 16-bit storage need
HEAD_WIDTHS = (64, 128, 256)  # a head is padded to the next of these
HEAD_MAX_WIDTH = HEAD_WIDTHS[-1]
GROUP = 4  # query heads of one key/value head that a program of the decode step takes together, where there are several

# --- the layer around the attentions
LAYER_WIDTHS = (1024, 2048, MAX_WIDTH)  # a row that a program holds whole is padded to the next of these
LAYER_MAX_DEPTH = 65536  # of a matrix product, which holds no row
PRODUCT_ROWS = (1, 16, 64)  # rows (B T) up to which a product takes small tiles; beyond the last: "any"
# Depth of a product of up to 64 rows up to which an architecture may have tiles of their own; of up to 16 rows, all weights are then read before the wait.
AHEAD_DEPTH = 1024
# Depths of one row's product up to which weights of 8 bits have tiles of their own: matrix instructions take them, and all of a row's lie ahead.
WHOLE_DEPTHS = LAYER_WIDTHS[:2]
MANY_ROWS = 512  # rows beyond which a product goes by tensor descriptors, where an architecture has tiles for it
MANY_WORK = 3 << 20  # elements of its result below which large tiles, of 128 x 256, would leave multiprocessors without one
MANY_PROGRAMS = 512  # that share its tiles at most, each of which is given memory for its descriptors
QUANTISED_ROWS = PRODUCT_ROWS[::2]  # the same where weights are 8 bits: each number more is some seventy binaries
SINGLE_ROWS = 32  # rows of a tile up to which a row of the projections has a program of its own for gamma
ROTARY_LIMBS = 4  # of a frequency, see rope.py
ROTARY_MAX_PAIRS = 128  # d / 2

# --- the decode step of both attentions at a time
MIXER_WIDTHS = LAYER_WIDTHS
MIXER_HEADS = HEAD_WIDTHS[:2]
# Wider rows than MIXER_BROAD in caches of at most MIXER_SHORT, which are those of a batch: a split takes this many times its tiles at least.
MIXER_BROAD, MIXER_SHORT = MIXER_WIDTHS[0], 4096
MIXER_MANY_F, MIXER_MANY_B = 4, 2  # of causal and of feedback attention
MIXER_MOST_B = 96  # splits of feedback attention that such rows may have: with causal attention's, a program each, in place at once (measured on an H200)
MIXER_UNIT_F, MIXER_UNIT_B = 2, 4  # of whose multiples a split takes rows, of causal and of feedback attention: whole tiles (measured on an H200)

# --- a step of 2 to STEP_ROWS rows of a sequence; wider models take the kernels of prefill
ROWS_WIDTHS = MIXER_WIDTHS[:2]
ROWS_HEADS = MIXER_HEADS
