"""TVI-LFM: text-enhanced visible-infrared person re-identification, in plain PyTorch (Hu, Yang, Ye; NeurIPS 2024)."""

__version__ = "0.2.0"
