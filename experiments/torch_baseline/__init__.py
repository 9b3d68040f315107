"""FedRouter's flow in PyTorch and PEFT, as its users would write it: what `bench.py` compares with."""
