"""Where ranks are started, one file per target."""
