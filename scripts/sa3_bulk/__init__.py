"""Bulk jobs of `sa3_trt` on Ray: a ring on every GPU of a machine or a cluster. Needs the extra `ray`."""
