"""TVI-LFM: text-enhanced visible-infrared person re-identification, in plain PyTorch (Hu, Yang, Ye; NeurIPS 2024)."""
