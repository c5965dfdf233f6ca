package xenbus

// Next is the xenbus handshake: what an end in this role does next. It is total:
// every combination of facts has an answer, whatever the peer, the toolstack or an
// earlier process left behind. Called again with the state it said to write and
// the same peer, it comes to rest after a few steps.
//
// A frontend connects as Linux netfront does, after a close cycle as Windows does
// it if the backend still is in an earlier connection. A backend answers every
// state a frontend may go through as Linux netback does, by the shortest path that
// does not leave out Closing.
func Next(role Role, f Facts) Step {
	// Rings of an earlier generation are nobody's.
	if f.attached() && f.Attached != f.Generation {
		return Step{Do: Release}
	}
	if role == Backend {
		if f.attached() {
			return f.backAttached()
		}
		return f.back()
	}
	if f.attached() {
		return f.frontAttached()
	}
	return f.front()
}

// unwritable is for an end that may not or cannot write its state.
func (f *Facts) unwritable(otherwise Action) Step {
	if f.attached() {
		return Step{Do: Release}
	}
	return Step{Do: otherwise}
}

// become is a step that only writes a state, if we are not in it.
func (f *Facts) become(s State) Step {
	if f.Own == s {
		return Step{Do: Wait}
	}
	return Step{Wait, s}
}

// front is a frontend that shares nothing.
func (f *Facts) front() Step {
	switch {
	case f.Lost:
		return Step{Do: Finish}
	case f.Leaving && (f.Gone || f.Own == Closed):
		return Step{Do: Finish}
	case f.Gone: // a directory may be made again
		return Step{Do: Wait}
	case f.Vanished && (f.Leaving || f.Own != Initialising):
		return f.become(Closed)
	case f.Vanished:
		return Step{Do: Wait}
	}
	switch f.Peer {
	case Initialised, Connected, Reconfiguring, Reconfigured:
		// It is in a connection we know nothing of: the close cycle.
		return f.become(Closing)
	case Closing:
		return f.become(Closed)
	case Closed:
		if f.Leaving || !f.Online {
			return f.become(Closed)
		}
	}
	switch {
	case f.Leaving:
		return f.become(Closed)
	case f.Peer == InitWait && f.Own == Initialising:
		return Step{Connect, Connected}
	}
	return f.become(Initialising)
}

// frontAttached is a frontend whose rings the backend may be using.
func (f *Facts) frontAttached() Step {
	if f.Lost || f.Gone {
		return f.unwritable(Finish)
	}
	switch {
	case f.Vanished || f.Peer == Closed || f.Peer == Unknown:
		if f.Own == Closed {
			return Step{Do: Release}
		}
		return Step{Release, Closed}
	case f.Own == Closed: // until the backend says it has let go
		return Step{Do: Drain}
	case f.Peer == Closing:
		return Step{Drain, Closed}
	case f.Own == Closing:
		return Step{Do: Drain}
	case f.Own != Connected || f.Leaving || f.SawClosing:
		return Step{Drain, Closing}
	case f.Peer.up():
		return Step{Do: Run}
	}
	return Step{Do: Wait} // not connected yet, or restarted and about to adopt our rings
}

// back is a backend that has nothing of the frontend mapped.
func (f *Facts) back() Step {
	if f.Lost || f.Gone {
		return f.unwritable(Finish)
	}
	if f.Leaving || !f.Online || f.Vanished {
		if f.Own == Closed {
			return Step{Do: Finish}
		}
		return f.toClosed()
	}
	switch f.Peer {
	case Closing:
		return f.become(Closing)
	case Closed:
		return f.toClosed()
	case InitWait, Reconfigured: // no frontend is ever in these
		return f.become(Closing)
	case Initialising:
		return f.toInitWait()
	}
	// Unknown, Initialised, Connected, Reconfiguring
	switch f.Own {
	case Unknown, Initialising:
		return f.toInitWait()
	case InitWait:
		if f.Peer != Connected {
			return Step{Do: Wait}
		}
		if f.Hotplug {
			return Step{Connect, Connected}
		}
		return Step{Do: Connect}
	case Closing: // until the frontend closes
		return Step{Do: Wait}
	case Closed:
		if f.Peer == Connected {
			return f.toInitWait()
		}
		return Step{Do: Wait}
	}
	// A backend before us died in this state.
	if f.Adopt && f.Peer == Connected {
		return Step{Prepare, InitWait}
	}
	return Step{Wait, Closing}
}

// toClosed is the next step from any state to Closed.
func (f *Facts) toClosed() Step {
	switch f.Own {
	case Unknown, Initialising, Closing, Closed:
		return f.become(Closed)
	}
	return Step{Wait, Closing}
}

// toInitWait is the next step from any state to InitWait.
func (f *Facts) toInitWait() Step {
	switch f.Own {
	case Unknown, Initialising, Closed:
		return Step{Prepare, InitWait}
	case InitWait:
		return Step{Do: Wait}
	case Closing:
		return Step{Wait, Closed}
	}
	return Step{Wait, Closing}
}

// backAttached is a backend that has the frontend's rings mapped.
func (f *Facts) backAttached() Step {
	if f.Lost || f.Gone {
		return f.unwritable(Finish)
	}
	switch f.Own {
	case Unknown, Initialising, Closed: // the directory is not the one we connected
		return Step{Do: Release}
	}
	if f.Vanished || (f.Peer != Initialised && f.Peer != Connected && f.Peer != Reconfiguring) {
		// The frontend has let go, or never should have come here. Unmap before
		// Closing is written: it may revoke its grants as soon as it sees that.
		if f.Own == Closing {
			return Step{Do: Release}
		}
		return Step{Release, Closing}
	}
	switch {
	case f.Own == Closing: // until the frontend closes
		return Step{Do: Drain}
	case f.Leaving || !f.Online || f.Peer == Reconfiguring:
		return Step{Drain, Closing}
	case f.Own == Connected:
		return Step{Do: Run}
	case f.Own != InitWait:
		return Step{Drain, Closing}
	case f.Hotplug:
		return Step{Run, Connected}
	}
	return Step{Do: Wait} // attached, but Connected waits for the hotplug script
}
