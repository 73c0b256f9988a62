"""Networks from files, and files from networks: this package's folders and other libraries' formats."""
