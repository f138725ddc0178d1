"""Sweeps: what varies, and what their trials found."""
