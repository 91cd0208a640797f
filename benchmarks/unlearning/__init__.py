"""What unlearning and continual learning do on real models and data. Begin with `__main__`."""
