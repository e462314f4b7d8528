"""Quantization schemes: how a weight is stored, loaded and multiplied. Called by models."""
