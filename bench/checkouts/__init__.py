"""Public model code, built small on a CPU: what stands for missing packages, builders, inputs, and the recipes."""
