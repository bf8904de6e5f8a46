"""Files: the commit protocol, strict JSON, safetensors checks, one module for each adapter format."""
