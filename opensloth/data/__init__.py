"""From a dataset's rows to packed batches."""
