"""Array kernels of stkit. They import torch (and, on a GPU, triton) and nothing of stkit."""
