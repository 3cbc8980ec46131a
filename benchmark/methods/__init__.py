"""One file a method, found by folder: adding a file adds the method."""
