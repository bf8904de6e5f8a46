"""Base models: loading, fingerprint, ragged batches, generation."""
