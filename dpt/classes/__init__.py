"""The classes of data sets: names and colours, a data set a file."""
