"""Token shards, the loader that reads them in training order, and the makers of data sets (`llmc-data`)."""
