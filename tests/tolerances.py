"""How far two numbers that should be equal may lie apart; never relaxed per test."""

GOLDEN_LOGITS = 1e-4  # Meta's code in float32 sums in another order than XLA
GOLDEN_LOGPROBS = 1e-4  # the same logits behind a log-softmax, which does not amplify
ORACLE_FLOAT32 = 1e-5  # float32 model against the NumPy oracle in float64
EQUAL_FORWARD = 1e-5  # one function computed in two shapes, layouts or shardings
