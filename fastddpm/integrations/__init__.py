"""fastddpm inside other libraries. A submodule imports the library that it is for, so nothing is imported from here."""
