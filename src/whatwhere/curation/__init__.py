"""A data set looked at through a classifier: labels to doubt, copies, kinds within a class."""
