"""Reading and writing of networks, in this package's folders and in other libraries' formats."""
