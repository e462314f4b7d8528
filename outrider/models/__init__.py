"""Models: what is computed. Called by the runner; calls quant and kernels; knows no scheduler."""
