"""Function bodies of SessaFeedbackAttention and SessaCausalAttention in standard ONNX operators.

The exported graph keeps the two ops as nodes of domain `sessa`; these bodies make the file run wherever ONNX runs. They are
written in ONNX's own text syntax for one storage type and one opset; head counts are read from shapes at run time.

Numbers: softmax, gamma * alpha, the diagonal solve and every product are float32 (float64 for float64 storage), and the result is
rounded once. A past row at or beyond past_length[b] never meets a product: its score is replaced and its value row is gathered from a
live row, so NaN there goes nowhere. A new row that is not finite poisons itself and later rows of its own sequence only: inside
a block it is replaced by zeros (0 * NaN is NaN) and the poison is added back from that row on.

The feedback body attends to the past for all rows at once, and solves (I - L) s = f + gamma * (what comes from earlier rows) by blocks of
rows: a block's softmax runs over past and new together, and the past's product enters with the weight the past has there. In a
block L is nilpotent, so its inverse is the finite product (I + L)(I + L^2)(I + L^4)...; that alone has several times the rounding
error of forward substitution, and one step of residual correction brings it back. Row 0 has no new predecessor: blocks start at row
1, and a decode step runs none.

In the causal body past keys pass through a Reshape between their two transposes: ONNX Runtime would merge these into one that is
slow in memory, and instead fuses the second into the product.
"""

from __future__ import annotations

import string

import onnx
import onnx.parser

from sessa_deploy import contract

BLOCK = 64  # rows solved at once in the feedback body; a power of two
# A masked score is the lowest finite value, so that a row with nothing to see keeps a finite softmax, whose product is then replaced by 0.
_LOWEST = {"float": "-3.4028234e38", "double": "-1.7976931348623157e308"}
_NUMBER = {"float": onnx.TensorProto.FLOAT, "double": onnx.TensorProto.DOUBLE}

# How both begin: constants, lengths, and which rows of the past count.
_HEAD = """
<domain: "$domain", opset_import: ["" : $opset]>
$op <scale, storage> ($inputs) => ($output)
{
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    axis1 = Constant <value = int64[1] {1}> ()
    axis2 = Constant <value = int64[1] {2}> ()
    lowest = Constant <value = $work {$lowest}> ()
    nought = Constant <value = $work {0.0}> ()
    $scale

    shape_past = Shape (past_k)
    past = Gather <axis = 0> (shape_past, one)
    shape_new = Shape ($new)
    tokens = Gather <axis = 0> (shape_new, one)
    length = Cast <to = 7> (past_length)
    length_col = Unsqueeze (length, axis1)
    past_row = Range (zero, past, one)
    live = Less (past_row, length_col)
"""


def _begin(inputs: str, output: str, new: str) -> str:
    """_HEAD with the names of inputs and output, and that of the input whose second dimension is T."""
    return string.Template(_HEAD).safe_substitute(inputs=inputs, output=output, new=new)


_FEEDBACK = _begin("q, k, gamma, f, past_k, past_s, past_length", "s", new="q") + """\
    live3 = Unsqueeze (live, axis1)

    q_w = $load (q)
    query = Mul (q_w, scale_w)
    past_k_w = $load (past_k)
    past_key = Transpose <perm = [0, 2, 1]> (past_k_w)
    score_past = MatMul (query, past_key)
    past_s_w = $load (past_s)
    shortest = ReduceMin <keepdims = 0> (length)
    all_live = GreaterOrEqual (shortest, past)
    from_past = If (all_live) <
        then_branch = all_rows () => ($work[B, T, D] from_all) {
            alpha_all = Softmax <axis = -1> (score_past)
            from_all = MatMul (alpha_all, past_s_w)
        },
        else_branch = live_rows () => ($work[B, T, D] from_live) {
            score_live = Where (live3, score_past, lowest)
            alpha_live = Softmax <axis = -1> (score_live)
            last_live = Sub (length_col, one)
            last_row = Max (last_live, zero)
            index = Min (past_row, last_row)
            index_col = Unsqueeze (index, axis2)
            value = GatherND <batch_dims = 1> (past_s_w, index_col)
            from_any = MatMul (alpha_live, value)
            has_past = Greater (length_col, zero)
            has_past3 = Unsqueeze (has_past, axis2)
            from_live = Where (has_past3, from_any, nought)
        }
    >
    gamma_w = Cast <to = $number> (gamma)
    gain = Unsqueeze (gamma_w, axis2)
    fed = Mul (gain, from_past)
    f_w = $load (f)
    k_w = $load (k)
    only_past = Add (f_w, fed)

    block = Constant <value = int64 {$block}> ()
    block_less_two = Constant <value = int64 {$block_less_two}> ()
    padded = Add (tokens, block_less_two)
    blocks = Div (padded, block)
    go_on = Constant <value = bool {1}> ()
    solved = Loop (blocks, go_on, only_past) <
        body = solve_block (int64 step, bool go_in, $work[B, T, D] s_in) => (bool go_out, $work[B, T, D] s_out) {
            go_out = Identity (go_in)
            skipped = Mul (step, block)
            start = Add (skipped, axis1)
            stop_any = Add (start, block)
            tokens1 = Reshape (tokens, axis1)
            stop = Min (stop_any, tokens1)
            origin = Constant <value = int64[1] {0}> ()
            minus1 = Constant <value = int64[1] {-1}> ()
            first = Squeeze (start, origin)
            last = Squeeze (stop, origin)
            block_row = Range (first, last, one)

            query_rows = Slice (query, start, stop, axis1)
            key_rows = Slice (k_w, origin, stop, axis1)
            key = Transpose <perm = [0, 2, 1]> (key_rows)
            score_new = MatMul (query_rows, key)
            column = Range (zero, last, one)
            row_col = Unsqueeze (block_row, axis1)
            before = Less (column, row_col)
            score_seen = Where (before, score_new, lowest)
            score_past_rows = Slice (score_past, start, stop, axis1)
            score_past_live = Where (live3, score_past_rows, lowest)
            none = Slice (score_seen, minus1, tokens1, axis2)
            score = Concat <axis = -1> (none, score_past_live, score_seen)
            alpha = Softmax <axis = -1> (score)
            gain_rows = Slice (gain, start, stop, axis1)
            weight = Mul (gain_rows, alpha)
            new1 = Add (past, axis1)
            weight_each = Slice (weight, origin, new1, axis2)
            weight_past = ReduceSum <keepdims = 1> (weight_each, axis2)
            from_past_rows = Slice (from_past, start, stop, axis1)
            fed_rows = Mul (weight_past, from_past_rows)
            f_rows = Slice (f_w, start, stop, axis1)
            rhs_rows = Add (f_rows, fed_rows)
            start_new = Add (start, new1)
            stop_new = Add (stop, new1)
            weight_solved = Slice (weight, new1, start_new, axis2)
            s_solved = Slice (s_in, origin, start, axis1)
            from_solved = MatMul (weight_solved, s_solved)
            rows_any = Add (rhs_rows, from_solved)
            poison_w = Slice (weight, minus1, stop_new, axis2)
            rows_bad = Add (rows_any, poison_w)
            zeros = Mul (rows_bad, nought)
            poison = ReduceSum <keepdims = 1> (zeros, axis2)
            sound = Equal (poison, nought)
            rows = Where (sound, rows_bad, nought)
            power1_any = Slice (weight, start_new, stop_new, axis2)
            power1 = Where (sound, power1_any, nought)
$inverse
            lift = MatMul ($inverse_name, rows)
            guess = Add (rows, lift)
            guess_fed = MatMul (power1, guess)
            guess_left = Sub (guess, guess_fed)
            residual = Sub (rows, guess_left)
            residual_lift = MatMul ($inverse_name, residual)
            residual_solved = Add (residual, residual_lift)
            better = Add (guess, residual_solved)
            spread = CumSum (poison, axis1)
            block_s = Add (better, spread)

            axes02 = Constant <value = int64[2] {0, 2}> ()
            block_row3 = Unsqueeze (block_row, axes02)
            shape_s = Shape (s_in)
            batch = Gather <axis = 0> (shape_s, zero)
            sequence = Range (zero, batch, one)
            axes12 = Constant <value = int64[2] {1, 2}> ()
            sequence3 = Unsqueeze (sequence, axes12)
            no_row = Mul (block_row3, zero)
            sequence_index = Add (sequence3, no_row)
            no_sequence = Mul (sequence3, zero)
            row_index = Add (block_row3, no_sequence)
            index_s = Concat <axis = -1> (sequence_index, row_index)
            s_out = ScatterND (s_in, index_s, block_s)
        }
    >
    s = $store (solved)
}
"""

_CAUSAL = _begin("q, k, v, past_k, past_v, past_length", "o", new="k") + """\
    axes12 = Constant <value = int64[2] {1, 2}> ()
    live4 = Unsqueeze (live, axes12)
    row = Range (zero, tokens, one)
    row_col = Unsqueeze (row, axis1)
    after = Greater (row, row_col)

    q_w = $load (q)
    q_scaled = Mul (q_w, scale_w)
    copy_two = Constant <value = int64[2] {0, 0}> ()
    any = Constant <value = int64[1] {-1}> ()
    two = Constant <value = int64[1] {2}> ()
    three = Constant <value = int64[1] {3}> ()
    kv_heads = Gather <axis = 0> (shape_new, two)
    width = Gather <axis = 0> (shape_new, three)
    grouped = Concat <axis = 0> (copy_two, kv_heads, any, width)
    q_grouped = Reshape (q_scaled, grouped)
    q_by_head = Transpose <perm = [0, 2, 3, 1, 4]> (q_grouped)
    by_head = Concat <axis = 0> (copy_two, any, width)
    query = Reshape (q_by_head, by_head)

    k_w = $load (k)
    v_w = $load (v)
    k_zeros = Mul (k_w, nought)
    v_zeros = Mul (v_w, nought)
    kv_zeros = Add (k_zeros, v_zeros)
    axes23 = Constant <value = int64[2] {2, 3}> ()
    poison = ReduceSum <keepdims = 1> (kv_zeros, axes23)
    sound = Equal (poison, nought)
    k_sound = Where (sound, k_w, nought)
    v_sound = Where (sound, v_w, nought)
    poison_row = Squeeze (poison, axes23)
    axes123 = Constant <value = int64[3] {1, 2, 3}> ()
    poison5 = Unsqueeze (poison_row, axes123)
    bias = Where (after, lowest, poison5)

    past_k_w = $load (past_k)
    past_k_by_head = Transpose <perm = [0, 2, 1, 3]> (past_k_w)
    past_k_rows = Reshape (past_k_by_head, by_head)
    past_key = Transpose <perm = [0, 1, 3, 2]> (past_k_rows)
    score_past = MatMul (query, past_key)
    score_past_m = Where (live4, score_past, lowest)
    key = Transpose <perm = [0, 2, 3, 1]> (k_sound)
    score_new = MatMul (query, key)
    tokens1 = Reshape (tokens, axis1)
    by_group = Concat <axis = 0> (copy_two, any, tokens1, tokens1)
    score_grouped = Reshape (score_new, by_group)
    score_biased = Add (score_grouped, bias)
    by_row_of_head = Concat <axis = 0> (copy_two, any, tokens1)
    score_new_m = Reshape (score_biased, by_row_of_head)
    score = Concat <axis = -1> (score_past_m, score_new_m)
    alpha = Softmax <axis = -1> (score)
    past1 = Reshape (past, axis1)
    widths = Concat <axis = 0> (past1, tokens1)
    alpha_past, alpha_new = Split <axis = -1> (alpha, widths)

    last_live = Sub (length_col, one)
    last_row = Max (last_live, zero)
    index = Min (past_row, last_row)
    index_col = Unsqueeze (index, axis2)
    past_v_live = GatherND <batch_dims = 1> (past_v, index_col)
    past_v_w = $load (past_v_live)
    past_value = Transpose <perm = [0, 2, 1, 3]> (past_v_w)
    from_any = MatMul (alpha_past, past_value)
    has_past = Greater (length_col, zero)
    has_past4 = Unsqueeze (has_past, axes23)
    from_past = Where (has_past4, from_any, nought)
    value = Transpose <perm = [0, 2, 1, 3]> (v_sound)
    from_new = MatMul (alpha_new, value)
    mixed = Add (from_past, from_new)
    by_group_row = Concat <axis = 0> (copy_two, any, tokens1, width)
    mixed_grouped = Reshape (mixed, by_group_row)
    mixed_rows = Transpose <perm = [0, 3, 1, 2, 4]> (mixed_grouped)
    o_w = Reshape (mixed_rows, by_head)
    o = $store (o_w)
}
"""


def _inverse(block: int) -> tuple[list[str], str]:
    """Lines that sum L + L^2 + ... + L^(block-1) from `power1` = L (nilpotent), and the name of that sum.

    With N = L + ... + L^(n-1) and P = L^n, the next sum is N + P + N P: (I + N)(I + P) - I. The identity is left out for accuracy.
    """
    lines, total, length = [], "power1", 2
    while length < block:
        power, half = f"power{length}", f"power{length // 2}"
        lines += [
            f"{power} = MatMul ({half}, {half})",
            f"cross{length} = MatMul ({total}, {power})",
            f"both{length} = Add ({total}, {power})",
            f"sum{length} = Add (both{length}, cross{length})",
        ]
        total, length = f"sum{length}", length * 2
    return lines, total


def _parse(text: str, op: str, storage: int, opset: int, block: int) -> onnx.FunctionProto:
    if storage not in {p.onnx for p in contract.PRECISIONS.values()}:
        raise ValueError(f"storage {storage} is not an ONNX type number of {', '.join(contract.PRECISIONS)}")
    if opset not in contract.OPSETS:
        raise ValueError(f"opset {opset} is not in {contract.OPSETS[0]}..{contract.OPSETS[-1]}")
    if block < 2 or block & (block - 1):
        raise ValueError(f"block {block} is not a power of two >= 2")
    work = "double" if storage == onnx.TensorProto.DOUBLE else "float"
    scale = "scale_w = Constant <value_float: float = @scale> ()"
    if work == "double":
        scale = "scale32 = Constant <value_float: float = @scale> ()\n    scale_w = Cast <to = 11> (scale32)"
    rounded = storage != _NUMBER[work]
    lines, total = _inverse(block)
    return onnx.parser.parse_function(
        string.Template(text).substitute(
            domain=contract.DOMAIN, op=op, opset=opset, work=work, number=_NUMBER[work], lowest=_LOWEST[work], scale=scale,
            load=f"Cast <to = {_NUMBER[work]}>" if rounded else "Identity", store=f"Cast <to = {storage}>" if rounded else "Identity",
            block=block, block_less_two=block - 2, inverse="\n".join(" " * 12 + line for line in lines), inverse_name=total,
        )
    )


def feedback_function(storage: int, opset: int, block: int = BLOCK) -> onnx.FunctionProto:
    """Body of SessaFeedbackAttention: q, k, f (B,T,D), past_k, past_s (B,P,D) of ONNX type `storage`, gamma (B,T) float32 (or
    float64 beside float64), past_length (B,) int32 -> s (B,T,D). s_t = f_t + gamma_t sum_j alpha[t,j] s_j (arXiv 2604.18580, section 3).

    opset: of the graph, 17..23. block: rows solved at once. Raises ValueError on an unknown storage, opset or block.
    """
    return _parse(_FEEDBACK, contract.FEEDBACK_OP, storage, opset, block)


def causal_function(storage: int, opset: int) -> onnx.FunctionProto:
    """Body of SessaCausalAttention: q (B,T,Hq,d), k, v (B,T,Hkv,d), past_k, past_v (B,P,Hkv,d) of ONNX type `storage`,
    past_length (B,) int32 -> o (B,T,Hq,d), over past rows j < past_length[b] and new rows j <= t. No Loop and no If, so TensorRT can take it inlined.

    opset: of the graph, 17..23. Raises ValueError on an unknown storage or opset.
    """
    return _parse(_CAUSAL, contract.CAUSAL_OP, storage, opset, BLOCK)


def functions(storage: int, opset: int) -> list[onnx.FunctionProto]:
    """Both bodies, in the order in which the file lists them."""
    return [feedback_function(storage, opset), causal_function(storage, opset)]
