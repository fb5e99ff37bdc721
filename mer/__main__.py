"""`python -m mer`, where the command `mer` is not on the path."""

from mer.cli.main import main

if __name__ == "__main__":
    main()
