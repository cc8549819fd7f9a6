"""How far two numbers that should be equal may lie apart; never relaxed per test."""

GOLDEN_LOGITS = 1e-4  # Meta's code in float32 sums in another order than XLA
GOLDEN_LOGPROBS = 1e-4  # the same logits behind a log-softmax, which does not amplify
ORACLE_FLOAT32 = 1e-5  # float32 model against the NumPy oracle in float64
EQUAL_FORWARD = 1e-5  # one function computed in two shapes, layouts or shardings
EQUAL_GRADIENT = 1e-5  # its gradient, relative to the largest entry of each leaf
ATTENTION_FLOAT32 = 1e-6  # one softmax and two short sums against float64
FINITE_DIFFERENCES = 1e-2  # float32 differences of a function against its gradient
LOGPROBS_FLOAT32 = 1e-5  # log-softmax in float32 against float64
SAMPLING_MASS = 1e-5  # a float32 sum of probabilities decides nothing nearer

# Activations are rounded to 8 and 11 bits: 2^-9 and 2^-12 in every operation, which a
# few layers of random weights amplify. Relative to the spread of the logits.
BFLOAT16_LOGITS = 1e-1
FLOAT16_LOGITS = 1.25e-2

ROPE_TABLES = 1e-6  # cosines of a float32 angle, exact but for their own rounding
ROPE_ROTATION = 2e-5  # a rotation by angles that are rounded to float32, up to 100
# At position 100,000 neighbouring float32 angles lie 2^-7 apart, and a frequency's own
# rounding is multiplied by the position: up to 2^-8 + 100,000 · 2^-24 = 0.01 radians.
ROPE_LONG = 1.2e-2

# Decoding's online softmax sums blocks in another order than the reference, in float32;
# in bfloat16 each rounds its weights (2^-9), before or after it divides by their sum.
DECODE_FLOAT32 = 2e-6
DECODE_BFLOAT16 = 2e-2

# GPU kernels against the float32 reference, relative to the largest entry. In float32
# they sum in another order; below, weights and outputs are rounded to 8 or 11 bits, and
# a gradient is made of both.
GPU_KERNEL = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}

# The TPU's flash attention and ring attention against the reference in float32,
# relative to the largest entry. In float32 they sum in another order; in bfloat16 the
# weights and the result are each rounded to 8 bits (2^-9). Gradients are also made of
# dp - Σ o·do, whose second part is of the rounded output, and which may cancel.
FLASH = {"float32": 2e-6, "bfloat16": 2**-7}
FLASH_GRADIENT = {"float32": 2e-6, "bfloat16": 2**-6}

# A step of training in float32 against float64, and against PyTorch's float32: the
# length of the difference of two gradients beside that of one, leaf by leaf.
TRAIN_GRADIENT = 1e-5
TRAIN_LOSS = 1e-5
TRAIN_HUNDRED_STEPS = 1e-3  # of the loss, once rounding went through AdamW that often

# Logits over a cache in eight bits, relative to their spread. Half a step is 1/254 of
# the largest of a slot's head, twice what bfloat16 rounds; but only keys and values are
# rounded, and only once, so that two layers of random weights stay below bfloat16's.
INT8_CACHE_LOGITS = 5e-2
