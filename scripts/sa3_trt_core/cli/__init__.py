"""The command line of sa3_trt."""
