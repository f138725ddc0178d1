"""Claims about speed, each measured against its baseline in the same run on the same machine."""
