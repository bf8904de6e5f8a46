"""The demo: one real task, a base model, an adapter, the difference."""
