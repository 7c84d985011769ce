"""`optbench margin`: how slowly training reaches its robustness margin (docs/margin.md)."""
