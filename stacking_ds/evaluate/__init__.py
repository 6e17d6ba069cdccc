"""How good an encoder is: held-out masked-LM loss."""
