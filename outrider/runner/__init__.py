"""The runner: plans into tensors, tensors through the model, tokens back. One per rank; called by ``engine``."""
