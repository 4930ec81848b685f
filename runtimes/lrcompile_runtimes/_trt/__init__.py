"""Parts of the runtime ``trt``."""
