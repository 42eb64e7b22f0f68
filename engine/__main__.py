"""`python -m engine`: the engine's command line where Ray and the cluster are not installed."""

from engine.cli import main

if __name__ == "__main__":
    main()
