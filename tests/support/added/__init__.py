"""One file for each kind of thing that can be added to molora from outside; the last line puts it in its table."""
