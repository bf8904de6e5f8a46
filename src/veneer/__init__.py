"""Veneer: LoRA adapters for PyTorch models."""
