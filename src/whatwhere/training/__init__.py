"""Labels -> Classifier. No boxes are used, but to choose thresholds and, if that is asked for, the best epoch."""
