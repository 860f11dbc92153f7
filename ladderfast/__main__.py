from ladderfast.cli import main

raise SystemExit(main())
