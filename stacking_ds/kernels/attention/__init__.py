"""Attention within sequences that lie one behind the other, without a slot of padding."""
