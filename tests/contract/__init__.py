"""The contract that every layer of Veneer keeps: one suite over kinds, variants, storages and dtypes."""
