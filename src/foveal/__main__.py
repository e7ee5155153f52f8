"""`python -m foveal` and `accelerate launch -m foveal`."""

from foveal.cli.main import main

if __name__ == "__main__":
    main()
