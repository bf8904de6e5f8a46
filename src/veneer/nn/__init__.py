"""The layers that an adapter puts into a model; attach and detach; routing."""
