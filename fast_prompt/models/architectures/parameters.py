"""Parameters that the forwards of several architectures have after ``self``."""

HIDDEN = ("hidden_states",)
RESIDUAL = (*HIDDEN, "input_tensor")
MASKED = (*HIDDEN, "attention_mask", "kwargs")
MEMORY = ("encoder_hidden_states", "encoder_attention_mask")
