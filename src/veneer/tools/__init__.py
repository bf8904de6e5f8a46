"""What adapters are and what can be made of them."""
