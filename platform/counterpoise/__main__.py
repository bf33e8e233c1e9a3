from counterpoise.cli import main

main()
