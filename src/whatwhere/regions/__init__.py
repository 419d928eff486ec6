"""Heat (H W) -> mask -> components -> boxes, all in pixels of the original image."""
