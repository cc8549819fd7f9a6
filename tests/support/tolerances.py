"""Tolerances of comparisons; never relaxed per test."""

GOLDEN_LOGITS = 1e-4  # Meta's code in float32 sums in another order than XLA
GOLDEN_LOGPROBS = 1e-4  # log-softmax of the same logits, which does not amplify
ORACLE_FLOAT32 = 1e-5  # float32 model against the NumPy oracle in float64
EQUAL_FORWARD = 1e-5  # one function computed in two shapes, layouts or shardings
EQUAL_GRADIENT = 1e-5  # its gradient, relative to the largest entry of each leaf
ATTENTION_FLOAT32 = 1e-6  # one softmax and two short sums against float64
FINITE_DIFFERENCES = 1e-2  # float32 differences of a function against its gradient
LOGPROBS_FLOAT32 = 1e-5  # log-softmax in float32 against float64
SAMPLING_MASS = 1e-5  # resolution of a float32 sum of probabilities

# Activations are rounded to 8 and 11 bits, 2^-9 and 2^-12 in every operation, which a
# few layers of random weights amplify. Relative to the spread of the logits.
BFLOAT16_LOGITS = 1e-1
FLOAT16_LOGITS = 1.25e-2

ROPE_TABLES = 1e-6  # cosines of a float32 angle, exact except for rounding
ROPE_ROTATION = 2e-5  # a rotation by float32 angles up to 100
# At position 100,000 neighbouring float32 angles lie 2^-7 apart, and a frequency's own
# rounding is multiplied by the position: up to 2^-8 + 100,000 · 2^-24 = 0.01 radians.
ROPE_LONG = 1.2e-2

# Decoding's online softmax sums blocks in another order than the reference, in float32;
# in bfloat16 each rounds its weights (2^-9), before or after it divides by their sum.
DECODE_FLOAT32 = 2e-6
DECODE_BFLOAT16 = 2e-2

# GPU kernels against the float32 reference, relative to the largest entry. In float32
# they sum in another order; in other dtypes weights and outputs are rounded to 8 or 11
# bits, and gradients are computed from both.
GPU_KERNEL = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}

# The TPU's flash attention and ring attention against the reference in float32,
# relative to the largest entry. In float32 they sum in another order; in bfloat16 the
# weights and the result are each rounded to 8 bits (2^-9). Gradients also contain
# dp - Σ o·do, which uses the rounded output and may cancel.
FLASH = {"float32": 2e-6, "bfloat16": 2**-7}
FLASH_GRADIENT = {"float32": 2e-6, "bfloat16": 2**-6}

# A training step in float32 against float64, and against PyTorch's float32: norm of the
# difference of two gradients relative to the norm of one, leaf by leaf.
TRAIN_GRADIENT = 1e-5
TRAIN_LOSS = 1e-5
TRAIN_HUNDRED_STEPS = 1e-3  # of the loss, after rounding errors of a hundred steps

# Logits over an int8 cache, relative to their spread. Half a step is 1/254 of the
# largest entry of a slot and head, twice bfloat16's rounding; but only keys and values
# are rounded, and only once, so the error of two layers stays below bfloat16's.
INT8_CACHE_LOGITS = 5e-2
