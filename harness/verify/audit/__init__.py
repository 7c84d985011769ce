"""Audit any `torch.optim.Optimizer`: is it right on each engine, and does it keep torch's contract of optimizers?"""
