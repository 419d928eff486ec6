"""WHAT, as it was said before convolutional networks: pixels, histograms and words, a linear layer behind them."""
