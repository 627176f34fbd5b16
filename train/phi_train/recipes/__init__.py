"""Every system of the family, as the papers have it and at a size for a laptop."""
