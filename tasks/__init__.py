"""One file a task, found by folder: adding a file adds the task. A task never imports a method."""
