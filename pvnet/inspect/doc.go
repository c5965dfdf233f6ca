// Package inspect lets other processes of the same user, and of root, look into the vifs of
// this one: at their rings, and at the frames that they move. It is what "barevif ring" and
// "barevif dump" talk to.
//
// A process that uses pvnet asks for it with one option, beside the store of its counters:
//
//	server, err := inspect.Listen(inspect.Config{})
//	…
//	defer server.Close()
//	dev, err := pvnet.Connect(ctx, domain, "0", pvnet.Config{Inspector: server})
//
// [Listen] opens a unix socket in a directory of its user, [Dirs], which nobody else may
// enter. Besides, it asks the kernel who connects, and answers only its own user and root.
// A client can neither change a vif nor delay a frame: it may look, copy frames as far as
// there is room for the copies, and notify ([pvnet.Device.Kick]). Requests, clients and
// copies have limits, and a client that does not read is left after ten seconds.
//
// A program may also show what it is as a whole, beside its vifs: [Server.Show] gives a state
// of its own a name, and [States] asks the processes that have one of that name. A router
// shows its uplink, its guests and its flows so.
//
// [List] finds the vifs of other processes. What it, [States] and the methods of [Vif] return
// was said by another process, of a user that the caller named; it is bounded, but need not
// be true.
package inspect
